"""Where an imported dataset may come from, and how its file gets here.

One module a source: `https`, `objects` (s3, gs, az), `local` and `hub`. Each is given a `Request` and fills an
`Output`; what cannot be had is a `FetchError`. `address` decides which hosts may be asked, and which addresses may be
connected to.
"""
