# The whole stack in one image. Only the base image names a registry, and nothing names an index, so both can be replaced:
# BASE_IMAGE by any image with Python 3.11 to 3.13, venv and a CA store; the index by pip's settings.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# A venv, because the base image's own Python may belong to its package manager (PEP 668).
RUN python3 -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# The dependencies come before the sources, so that a change of code does not install them again. The secret pip_ca, if it
# is given and not empty, is the CA bundle that pip trusts, for a network whose proxy intercepts TLS. No layer contains it.
RUN --mount=type=secret,id=pip_ca \
    if [ -s /run/secrets/pip_ca ]; then export PIP_CERT=/run/secrets/pip_ca; fi \
    && /opt/venv/bin/python -c 'import tomllib; config = tomllib.load(open("pyproject.toml", "rb")); print(*config["build-system"]["requires"], *config["project"]["dependencies"], sep="\n")' > requirements.txt \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --only-binary=:all: \
       --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-index --no-deps --no-build-isolation .

FROM ${BASE_IMAGE}
COPY --from=build /opt/venv /opt/venv
COPY dstack_emu/deployment/healthcheck.py /usr/local/bin/healthcheck
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/var/lib/dstack-emu
# A numeric id, so that no user has to be created; 1000 usually owns the folders that a Linux user mounts. A new named
# volume gets the owner of the folder that it covers.
RUN install -d -o 1000 -g 1000 /var/lib/dstack-emu /run/pccs /run/agent /run/app
USER 1000:1000
WORKDIR /var/lib/dstack-emu
ENTRYPOINT ["dstack-emu"]
