from integrations.transformers_segmentation import *
