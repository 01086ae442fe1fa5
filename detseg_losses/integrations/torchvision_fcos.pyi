from integrations.torchvision_fcos import *
