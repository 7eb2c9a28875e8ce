"""Trainings in several processes of one job, its ranks. Nothing else touches `torch.distributed`.

Every rank runs the same job up to its last training, step by step, and takes its share of each batch; the first also
measures, exports and reports. They are forked and connected before the job reads a byte of an upload (`crew`).
"""
