"""What 08_run_on_gpu.py is made of: a clock, a roofline, the things that are timed, and the report."""
