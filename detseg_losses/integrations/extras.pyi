from integrations.extras import *
