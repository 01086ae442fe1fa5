from integrations.torchvision_segmentation import *
