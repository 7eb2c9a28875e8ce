"""What code would try that an upload smuggled into a job. A probe says `reached` where it got what it wanted.

Each is a function of a request and its own arguments, named "module.function" below this package.
"""
