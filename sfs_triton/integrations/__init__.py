"""Integrations with other libraries; a library is imported only by the modules of its integration."""
