"""What sparse MoE, INT8 quantization and distillation cost and buy on the reader's own CPU."""
