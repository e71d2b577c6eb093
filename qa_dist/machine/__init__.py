"""The machine that a run is on.

`checks` are the lines of `qa-dist doctor`, each a verdict on what was found and what to do; the command prints them.
`requirements` compares packages with the tested set. `environment` is what the record of a run says of versions and
hardware.
"""
