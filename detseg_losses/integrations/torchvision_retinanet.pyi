from integrations.torchvision_retinanet import *
