from integrations.samples import *
