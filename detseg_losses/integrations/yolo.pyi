from integrations.yolo import *
