"""An OpenAI-compatible HTTP server: ``sfs serve``, or :func:`sfs_triton.serve.app.create_app` under any ASGI server.

Importing this, or what the command line needs of it, takes none of the libraries of the extra ``serve``.
"""
