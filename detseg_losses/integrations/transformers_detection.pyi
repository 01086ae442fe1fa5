from integrations.transformers_detection import *
