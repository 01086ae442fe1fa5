from integrations.detection import *
