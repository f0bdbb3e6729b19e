"""Engines that UCM plugs into, one package each."""
