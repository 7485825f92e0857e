"""What a run will need, before anything is loaded: memory by part, FLOPs, time, and what fits.

The network is built from its config alone and trained for one pass on tensors that have shapes and no numbers
(torch's FakeTensorMode); what each part of that pass allocates is put together for all layers.
"""
