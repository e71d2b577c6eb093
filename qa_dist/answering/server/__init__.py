"""The server: questions of many clients over HTTP, answered by one worker that owns the device.

`queue` is what waits, without threads or clocks of its own; `batching` is the worker that empties it. `messages` reads
requests and writes answers, `app` is the FastAPI application, `guard` what stands before it, `protocol` what stands
before that: connections. `process` starts and stops all of it. `metrics` counts, `pages` are for a browser.
"""
