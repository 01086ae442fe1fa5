from integrations.torchvision_rcnn import *
