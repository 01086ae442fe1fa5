from integrations.torchvision_ops import *
