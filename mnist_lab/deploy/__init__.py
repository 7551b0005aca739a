"""A model -> the file that is deployed: its graph, the fastest layout of an MoE, and a look inside."""
