from integrations._adapter import *
