from integrations.coco import *
