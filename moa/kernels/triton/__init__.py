"""The engines that are written in Triton. Only this folder imports it, and only when one of them is used."""
