"""The server: questions of many clients over HTTP, answered by one worker that owns the device.

`process`: the socket, the keys, start and end of all of it.
`app`: the FastAPI application: what each path does.
`messages`: the JSON of requests and answers, and a sentence for each mistake in it.
`limits`: how much one client may ask, and for how long.
`queue`: what waits and whose turn is next; without threads or a clock of its own.
`batching`: the worker, which empties it in batches.
`guard`: what stands before the application: host names, headers, errors without details.
`protocol`: what stands before that: connections that are slow or too many.
`metrics`: what is counted, as Prometheus reads it.
`pages`: the pages for a browser, which load nothing else.
"""
