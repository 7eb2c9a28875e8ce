"""How a worker runs attempts at jobs, seats and inspections, each in a child process."""
