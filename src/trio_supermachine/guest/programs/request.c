#include "programs/request.h"

#include <stdlib.h>

bool request_read(struct request *request, struct reader *payload) {
    uint32_t ignored;
    request->flags = read_u32(payload);
    request->timeout_ms = read_u32(payload);
    request->columns = read_u16(payload);
    request->rows = read_u16(payload);
    request->window = read_u32(payload);
    request->cwd = read_string(payload);
    request->user = read_string(payload);
    request->environment = read_list(payload, &ignored);
    uint32_t count = read_u32(payload);
    if (payload->bad || !count || count > MAX_LIST || count > payload->left / 4) return false;
    request->chain = calloc(count, sizeof *request->chain);
    if (!request->chain) return false;
    while (request->chain_count < count) {
        uint32_t arguments;
        request->chain[request->chain_count++] = read_list(payload, &arguments);
        if (payload->bad || !arguments) return false;
    }
    uint32_t files = read_u32(payload);
    if (payload->bad || files > payload->left / 16) return false;
    request->files = calloc(files + 1u, sizeof *request->files);
    if (!request->files) return false;
    for (; request->file_count < files; request->file_count++) {
        struct staged *file = &request->files[request->file_count];
        file->path = read_string(payload);
        file->mode = read_u32(payload);
        file->size = read_u64(payload);
    }
    return read_whole(payload) && !(request->flags & ~(uint32_t)EXEC_FLAGS);
}

void request_release(struct request *request) {
    while (request->chain_count) free(request->chain[--request->chain_count]);
    free(request->chain);
    free(request->environment);
    free(request->files);
}
