/* The input of a first layer, from token numbers as they lie in memory: words + segments + positions, layer norm, rows
 * padded with zeros. The slow twin is transformers' embeddings; tests/models/test_embeddings.py holds them together.
 *
 * Plain C99 and libm; all arrays are contiguous and row-major, and belong to the caller.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* sums at once, which compilers turn into vectors */

typedef struct {
    int64_t words, segments, positions, size;  /* rows of each table, and H */
    int64_t counted; /* -1: positions count from 0; else as RoBERTa's: this token has this position, and the others
                        are counted from the next on */
    const float *word, *segment, *position;    /* [., H] */
    const float *weight, *bias;                /* [H], of the norm */
    double eps;
} Tables;

/* One token; returns -1 where a number is outside its table. */
static int embed(const Tables *m, int64_t word, int64_t segment, int64_t position, float *restrict out)
{
    const int64_t size = m->size;
    if (word < 0 || word >= m->words || segment < 0 || segment >= m->segments || position < 0 ||
        position >= m->positions)
        return -1;
    const float *w = m->word + word * size, *s = m->segment + segment * size, *p = m->position + position * size;
    float sums[LANES] = {0}, squares[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int64_t j = 0; j < LANES; j++) {
            const float x = w[i + j] + s[i + j] + p[i + j];
            out[i + j] = x;
            sums[j] += x;
        }
    for (; i < size; i++) {
        out[i] = w[i] + s[i] + p[i];
        sums[0] += out[i];
    }
    float mean = 0.0f, variance = 0.0f;
    for (int64_t j = 0; j < LANES; j++)
        mean += sums[j];
    mean /= (float)size;
    for (i = 0; i + LANES <= size; i += LANES)
        for (int64_t j = 0; j < LANES; j++) {
            const float x = out[i + j] - mean;
            squares[j] += x * x;
        }
    for (; i < size; i++)
        squares[0] += (out[i] - mean) * (out[i] - mean);
    for (int64_t j = 0; j < LANES; j++)
        variance += squares[j];
    const float scale = (float)(1.0 / sqrt((double)variance / (double)size + m->eps));
    for (i = 0; i < size; i++)
        out[i] = (out[i] - mean) * scale * m->weight[i] + m->bias[i];
    return 0;
}

/* out [rows,tokens,H]: of each row the tokens ids[starts[r] ...], 0 <= lengths[r] <= tokens of them, then zeros.
 * segments may be NULL: all 0. A row without tokens begins with `padding`. Returns 0, or -1 where a token, segment or
 * position is outside its table, or a length out of range. */
int64_t rl_exit_embed(const Tables *m, int64_t rows, const int64_t *starts, const int64_t *lengths, int64_t tokens,
                      const int32_t *ids, const int8_t *segments, int32_t padding, float *out)
{
    for (int64_t r = 0; r < rows; r++, out += tokens * m->size) {
        const int64_t length = lengths[r], real = length > 0 ? length : 1;
        int64_t next = m->counted + 1;
        if (length < 0 || real > tokens)
            return -1;
        for (int64_t t = 0; t < real; t++) {
            const int64_t at = starts[r] + t;
            const int64_t word = length ? ids[at] : padding, segment = length && segments ? segments[at] : 0;
            const int64_t position = m->counted >= 0 && word == m->counted ? m->counted : next++;
            if (embed(m, word, segment, position, out + t * m->size))
                return -1;
        }
        memset(out + real * m->size, 0, (size_t)((tokens - real) * m->size) * sizeof(float));
    }
    return 0;
}
