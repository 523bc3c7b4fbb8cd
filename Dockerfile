# The whole stack in one image. Only the base image names a registry, and nothing names an index, so both can be replaced:
# BASE_IMAGE by any image with Python 3.11 to 3.13, venv and a CA store; the index by pip's settings.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# The date of every file, so that the same sources give the same layers. It is the day from which the certificates are valid.
ARG SOURCE_DATE_EPOCH=1767225600
# A venv, because the base image's own Python may belong to its package manager (PEP 668).
RUN python3 -m venv /opt/venv
WORKDIR /src
COPY requirements/image.txt requirements/
# The dependencies come before the sources, so that a change of code does not install them again. The secret pip_ca, if it
# is given and not empty, is the CA bundle that pip trusts, for a network whose proxy intercepts TLS. No layer contains it.
RUN --mount=type=secret,id=pip_ca \
    if [ -s /run/secrets/pip_ca ]; then export PIP_CERT=/run/secrets/pip_ca; fi \
    && /opt/venv/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check --only-binary=:all: --require-hashes \
       --requirement requirements/image.txt
COPY . .
# Compiled code names the hash of its source, not its date. -S: a module that is loaded already would be compiled to other bytes.
RUN /opt/venv/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check --no-index --no-deps --no-build-isolation . \
    && find /opt/venv -name __pycache__ -prune -exec rm -rf {} + \
    && PYTHONHASHSEED=0 /opt/venv/bin/python -S -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib \
    && install -D -t /opt/bin compose/entrypoint && install dstack_emu/deployment/healthcheck.py /opt/bin/healthcheck \
    && find /opt -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +

FROM ${BASE_IMAGE}
ARG SOURCE_DATE_EPOCH=1767225600
# DSTACK_EMU_STATE is the state folder of `up`, in which `ctl` finds the stack.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/var/lib/dstack-emu DSTACK_EMU_STATE=/var/lib/dstack-emu
# It runs as any user, so everyone may create files in these folders, as in /tmp. A new named volume gets the mode of the folder
# that it covers. 1000 usually owns the folders that a Linux user mounts; a numeric id needs no entry in /etc/passwd.
# COPY would give every folder the date of the build.
RUN --mount=type=bind,from=build,source=/opt,target=/mnt \
    cp -a /mnt/venv /opt/ && cp -a /mnt/bin/* /usr/local/bin/ \
    && install -d -o 1000 -g 1000 -m 1777 /var/lib/dstack-emu /var/lib/dstack-emu/app /run/pccs /run/agent /run/app \
    && find /opt /usr/local/bin /var/lib/dstack-emu /run/pccs /run/agent /run/app -type d \
       -exec touch --date="@$SOURCE_DATE_EPOCH" {} + && touch --date="@$SOURCE_DATE_EPOCH" /run /usr /usr/local /var /var/lib
USER 1000:1000
WORKDIR /var/lib/dstack-emu
EXPOSE 3101 3102 8010 8011 8070 8081 8085 8088 8090 8091 8092 8093 8443 8545 9301 9302
# For `up`. A container that runs another command needs another check, or none (docker run --no-healthcheck).
HEALTHCHECK --interval=2s --timeout=10s --start-period=30s --retries=30 CMD ["healthcheck", "stack:/var/lib/dstack-emu"]
ENTRYPOINT ["entrypoint"]
CMD ["up"]
