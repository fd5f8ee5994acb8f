# Kari's image, built where there is Docker, Podman or BuildKit and a registry:
#
#   docker build --tag REPOSITORY:TAG .
#
# `make image` makes the same without either: the files by the same script, and what
# the last stage says beside them is read from here, one ENV or LABEL a line. Its
# digest is the same each time; that of a builder is, too, where times are kept out:
# BuildKit does with --build-arg SOURCE_DATE_EPOCH=0 and rewrite-timestamp=true.
ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-bookworm AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      binutils ca-certificates git libnss-systemd openssh-client python3 systemd
WORKDIR /src
COPY . .
RUN hack/image-root.sh /image

# Nothing but the program, what it calls, and their libraries: no package manager,
# and no shell tools beyond sh.
FROM scratch
COPY --from=build /image /
ENV PATH=/usr/local/bin:/usr/bin:/bin
ENTRYPOINT ["/usr/bin/kari"]
LABEL org.opencontainers.image.title=kari
LABEL org.opencontainers.image.version=0.1.0
LABEL org.opencontainers.image.licenses=Apache-2.0
