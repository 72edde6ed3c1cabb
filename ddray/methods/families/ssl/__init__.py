"""Self-supervised distillation: KRR-ST and Boost-SSDD."""
