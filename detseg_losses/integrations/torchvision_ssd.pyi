from integrations.torchvision_ssd import *
