from integrations.segmentation import *
