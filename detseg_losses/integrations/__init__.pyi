from integrations import *
