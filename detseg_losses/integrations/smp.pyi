from integrations.smp import *
