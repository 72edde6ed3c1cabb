"""What a command asks for, resolved and run: plan, context, distillation, score, pool training."""
