#include "core/wire.h"

#include <stdlib.h>
#include <string.h>

static void read_into(struct reader *reader, void *value, size_t size) {
    if (reader->bad || reader->left < size) {
        reader->bad = true;
        memset(value, 0, size);
        return;
    }
    memcpy(value, reader->at, size);
    reader->at += size;
    reader->left -= size;
}

uint16_t read_u16(struct reader *reader) {
    uint16_t value;
    read_into(reader, &value, sizeof value);
    return value;
}

uint32_t read_u32(struct reader *reader) {
    uint32_t value;
    read_into(reader, &value, sizeof value);
    return value;
}

uint64_t read_u64(struct reader *reader) {
    uint64_t value;
    read_into(reader, &value, sizeof value);
    return value;
}

const uint8_t *read_bytes(struct reader *reader, uint32_t *size) {
    *size = read_u32(reader);
    if (reader->bad || *size > reader->left) {
        reader->bad = true;
        *size = 0;
        return NULL;
    }
    const uint8_t *bytes = reader->at;
    reader->at += *size;
    reader->left -= *size;
    return bytes;
}

const char *read_string(struct reader *reader) {
    uint32_t size;
    const uint8_t *bytes = read_bytes(reader, &size);
    if (!bytes || memchr(bytes, 0, size)) {
        reader->bad = true;
        return "";
    }
    char *text = (char *)reader->at - size - 1;
    memmove(text, text + 1, size);
    text[size] = 0;
    return text;
}

const char **read_list(struct reader *reader, uint32_t *count) {
    *count = read_u32(reader);
    if (reader->bad || *count > MAX_LIST || *count > reader->left / 4) {
        reader->bad = true;
        *count = 0;
    }
    const char **list = calloc(*count + 1, sizeof *list);
    if (!list) {
        reader->bad = true;
        return NULL;
    }
    for (uint32_t i = 0; i < *count; i++) list[i] = read_string(reader);
    return list;
}

bool read_whole(const struct reader *reader) { return !reader->bad && !reader->left; }

void write_header(uint8_t *at, uint32_t length, enum frame_type type, uint8_t stream) {
    memcpy(at, &length, 4);
    at[4] = (uint8_t)type;
    at[5] = stream;
    at[6] = at[7] = 0;
}

void write_u32(struct writer *writer, uint32_t value) {
    memcpy(writer->at, &value, sizeof value);
    writer->at += sizeof value;
}

void write_u64(struct writer *writer, uint64_t value) {
    memcpy(writer->at, &value, sizeof value);
    writer->at += sizeof value;
}

void write_string(struct writer *writer, const char *text) {
    size_t size = strlen(text);
    write_u32(writer, (uint32_t)size);
    memcpy(writer->at, text, size);
    writer->at += size;
}
