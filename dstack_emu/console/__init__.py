"""The console: pages in a browser that show and change a running stack, over the public control API alone.

Plain HTML, CSS and ES modules in `static/`, without a build step. Nothing else imports it but `stack`, which serves it
at the control port, and nothing needs it.
"""
