from integrations.voc import *
