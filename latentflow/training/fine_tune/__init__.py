"""Fine-tuning: the checkpoint that is started from, its defaults, adapters, prior preservation, memorisation."""
