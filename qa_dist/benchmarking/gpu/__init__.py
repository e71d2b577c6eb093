"""One command for a machine with a GPU: is everything right there, and how fast is it?

`items` takes item after item, each under its own limit, and keeps each result at once. The items of part A are in
`numerics`, `steps`, `runs` and `processes`, those of part B in `speed` and `squad`; `scene` has what they share.
`packing` gathers what a machine without a network needs, `page` writes docs/gpu.md, `command` reads the words.
"""
