"""An OpenAI-compatible HTTP server: ``sfs serve``, or :func:`sfs_triton.serve.app.create_app` under any ASGI server.

Importing this package, or the modules that the command line uses, needs no library of the extra ``serve``.
"""
