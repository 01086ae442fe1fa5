from integrations.transformers_masks import *
