"""What this machine offers: memory, cores, storage, OpenMP and allocator policy, rights.

Nothing in this room imports torch at module level: the OpenMP policy must be in the environment before
torch is loaded, so these modules must be usable first.
"""
