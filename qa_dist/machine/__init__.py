"""The machine that a run is on.

`checks`: the lines of `qa-dist doctor`: what was found, a verdict on it and what to do; the command prints them.
`requirements`: the packages that are needed, at which versions, and the versions that were tested.
`installation`: installs them with uv, set up as pip is, for the Makefile.
`environment`: what the record of a run says of versions, hardware and commit.
`usage`: cores and memory that this process may use and has used, and whether an error was a full GPU.
`allocator`: why memory on CPUs would grow in a long run, and the second start of the process that prevents it.
`cuda_environment`: variables that CUDA and its libraries read once, set before they start.
`cuda_graphs`: work of a GPU recorded once and replayed as a whole, and the rules of recording.
`kept_graphs`: the recordings of a run, one for each size of batch, and when one is made, used or dropped.
"""
