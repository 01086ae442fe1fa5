from integrations.smp_losses import *
