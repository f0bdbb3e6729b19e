"""The only room that names SGLang: its HiCache keeps pages in the store."""
