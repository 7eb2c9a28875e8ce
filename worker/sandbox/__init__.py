"""The second wall behind the vetting readers: what a child can do if an upload takes it over after all.

A child enters once, while it has one thread and before it touches a byte of an upload. From then on it and whatever it
starts read their inputs and the interpreter, write to one scratch folder, and reach neither the network nor another
process. Memory, disk, processes and time are bounded from outside, by `worker/watch.py`.
"""
