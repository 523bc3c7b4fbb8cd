"""What is around the services of a stack and can be watched, broken and turned back: journal, faults, clock, snapshots.

No service knows of it. It comes in by composition: middlewares around their applications, headers on what they ask one
another, wrappers around who judges.
"""
