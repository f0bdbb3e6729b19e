"""The probes of benchmarks/gpu_first_look.py."""
