/* One exit decision for all rows of a step, in one call: pooled state -> exit -> the policy's own answer -> figures ->
 * policy head. The slow twins are in rl_exit/models: exits.py (pool, ExitHeads.at), answer_heads.py (AnswerHeads.at),
 * answers.py (answer_figures) and policy.py (PolicyHeads.at); tests/models/test_native_exits.py holds them together.
 *
 * Plain C99 and libm; all arrays are float32, contiguous and row-major, and belong to the caller.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FIGURES 12
#define BLOCK 8 /* rows that share one reading of the weights */

typedef struct {
    int64_t layers, hidden, classes;
    int64_t width;                                        /* 0: the probability of what is answered is pi */
    int64_t answer_width;                                 /* 0: the exit answers */
    int64_t pooling;                                      /* 0 cls, 1 mean, 2 last */
    int64_t shared;                                       /* whether all policy heads have the same weights */
    const float *exit_weight, *exit_bias;                 /* [L,H,C] [L,C] */
    const float *scale, *answer_in, *answer_in_bias, *answer_out, *answer_out_bias; /* [L-1] [L-1,H,A] ... */
    const float *policy_in, *policy_in_bias, *policy_out, *policy_out_bias;
} Heads;

/* exp to 2e-7 of its value, written so that compilers turn a loop of it into vectors: 2^n times a polynomial on
 * [-ln2/2, ln2/2] (Cephes). Outside -87..88 the value there. */
static inline float quick_exp(float x)
{
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float n = rintf(x * 1.44269504f), r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                     1.6666665459e-1f) * r + 5.0000001201e-1f;
    const int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return (p * r * r + r + 1.0f) * scale;
}

static inline float quick_tanh(float x)
{
    return 1.0f - 2.0f / (quick_exp(2.0f * x) + 1.0f);
}

/* x Phi(x), with erf by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7. */
static inline float quick_gelu(float x)
{
    const float z = fabsf(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float beyond = 0.5f * p * quick_exp(-z * z); /* of the normal distribution beyond |x| */
    return x * (x < 0.0f ? beyond : 1.0f - beyond);
}

/* As product, for a number of columns that is known when this is compiled and too small to fill a vector: several sums
 * at once instead. */
#define LANES 16
static inline void narrow(int64_t rows, int64_t inner, const int64_t columns, const float *restrict x,
                          const float *restrict w, const float *restrict bias, float *restrict out)
{
    for (int64_t r = 0; r < rows; r++, x += inner, out += columns) {
        float sums[4][LANES] = {{0}};
        int64_t h = 0;
        for (; h + LANES <= inner; h += LANES)
            for (int64_t c = 0; c < columns; c++)
                for (int64_t i = 0; i < LANES; i++)
                    sums[c][i] += x[h + i] * w[(h + i) * columns + c];
        for (int64_t c = 0; c < columns; c++) {
            float sum = bias[c];
            for (int64_t i = 0; i < LANES; i++)
                sum += sums[c][i];
            for (int64_t i = h; i < inner; i++)
                sum += x[i] * w[i * columns + c];
            out[c] = sum;
        }
    }
}

/* out[r][c] = bias[c] + sum_h x[r][h] w[h][c] */
static void product(int64_t rows, int64_t inner, int64_t columns, const float *x, const float *w, const float *bias,
                    float *out)
{
    switch (columns) {
    case 2: narrow(rows, inner, 2, x, w, bias, out); return;
    case 3: narrow(rows, inner, 3, x, w, bias, out); return;
    case 4: narrow(rows, inner, 4, x, w, bias, out); return;
    }
    for (int64_t r = 0; r < rows; r++)
        memcpy(out + r * columns, bias, (size_t)columns * sizeof(float));
    if (columns < 8) { /* too few columns to fill a vector: several sums at once instead */
        for (int64_t r = 0; r < rows; r++)
            for (int64_t h = 0; h < inner; h++)
                for (int64_t c = 0; c < columns; c++)
                    out[r * columns + c] += x[r * inner + h] * w[h * columns + c];
        return;
    }
    int64_t h = 0;
    for (; h + 4 <= inner; h += 4) {
        const float *w0 = w + h * columns, *w1 = w0 + columns, *w2 = w1 + columns, *w3 = w2 + columns;
        for (int64_t r = 0; r < rows; r++) {
            const float *a = x + r * inner + h;
            const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
            float *restrict o = out + r * columns;
            for (int64_t c = 0; c < columns; c++)
                o[c] += a0 * w0[c] + a1 * w1[c] + a2 * w2[c] + a3 * w3[c];
        }
    }
    for (; h < inner; h++)
        for (int64_t r = 0; r < rows; r++) {
            const float a = x[r * inner + h];
            float *restrict o = out + r * columns;
            for (int64_t c = 0; c < columns; c++)
                o[c] += a * w[h * columns + c];
        }
}

static void pooled(const Heads *m, const float *restrict hidden, int64_t tokens, int64_t length, float *restrict out)
{
    const int64_t size = m->hidden;
    if (m->pooling == 1) {
        memset(out, 0, (size_t)size * sizeof(float));
        for (int64_t t = 0; t < length; t++)
            for (int64_t i = 0; i < size; i++)
                out[i] += hidden[t * size + i];
        const float share = 1.0f / (float)(length > 0 ? length : 1);
        for (int64_t i = 0; i < size; i++)
            out[i] *= share;
        return;
    }
    (void)tokens;
    const int64_t at = m->pooling == 2 && length > 0 ? length - 1 : 0;
    memcpy(out, hidden + at * size, (size_t)size * sizeof(float));
}

/* What the answers so far look like, as rl_exit.models.answers; returns the log-odds of the answer. Memory: [last p,
 * sum of p, votes] of C, then the last answer, its run, and the entropy in nats. */
static float figures(const Heads *m, int64_t layer, const float *restrict z, const float *before, float *restrict after,
                     float *restrict x)
{
    const int64_t c = m->classes;
    const float log_classes = logf((float)c);
    int64_t answer = 0;
    for (int64_t i = 1; i < c; i++)
        if (z[i] > z[answer])
            answer = i;
    const float top = z[answer];
    float rest = 0.0f, most = 0.0f, weighed = 0.0f;
    for (int64_t i = 0; i < c; i++) {
        const float apart = z[i] - top, e = i == answer ? 1.0f : expf(apart);
        after[i] = e;
        if (i != answer) {
            rest += e;
            weighed += e > 0.0f ? e * apart : 0.0f;
            if (e > most)
                most = e;
        }
    }
    const float whole = 1.0f / (1.0f + rest), best = whole;
    const float entropy = log1pf(rest) - weighed * whole, relative = entropy / log_classes;
    for (int64_t i = 0; i < c; i++)
        after[i] *= whole;
    const float odds = -logf(rest > 1e-30f ? rest : 1e-30f);
    memset(x, 0, FIGURES * sizeof(float));
    x[0] = (odds > 10.0f ? 10.0f : odds < -10.0f ? -10.0f : odds) / 3.0f;
    x[1] = best - most * whole;
    x[2] = relative;
    x[3] = logf(relative > 1e-6f ? relative : 1e-6f) / 3.0f;
    x[11] = 1.0f;
    float run = 0.0f;
    if (layer == 1) {
        memcpy(after + c, after, (size_t)c * sizeof(float));
        memset(after + 2 * c, 0, (size_t)c * sizeof(float));
    } else {
        const float below = 1.0f / (float)(layer - 1);
        const float same = before[3 * c] == (float)answer ? 1.0f : 0.0f;
        float change = 0.0f;
        for (int64_t i = 0; i < c; i++) {
            change += fabsf(after[i] - before[i]);
            after[c + i] = before[c + i] + after[i];
            after[2 * c + i] = before[2 * c + i];
        }
        run = same * (before[3 * c + 1] + 1.0f);
        x[4] = same;
        x[5] = before[2 * c + answer] * below;
        x[6] = before[answer];
        x[7] = before[c + answer] * below;
        x[8] = before[3 * c + 2] / log_classes;
        x[9] = 0.5f * change;
        x[10] = run / (float)m->layers;
    }
    after[2 * c + answer] += 1.0f;
    after[3 * c] = (float)answer;
    after[3 * c + 1] = run;
    after[3 * c + 2] = entropy;
    return odds;
}

static float policy(const Heads *m, int64_t head, const float *restrict x, float *restrict hidden)
{
    const int64_t width = m->width, set = m->shared ? 0 : head;
    const float *w = m->policy_in + set * FIGURES * width, *out = m->policy_out + set * width;
    const float *bias = m->policy_in_bias + head * width;
    float squares = 0.0f;
    for (int64_t i = 0; i < FIGURES; i++)
        squares += x[i] * x[i];
    const float norm = sqrtf(squares), scale = sqrtf((float)FIGURES) / (norm > 1e-6f ? norm : 1e-6f);
    memset(hidden, 0, (size_t)width * sizeof(float));
    for (int64_t i = 0; i < FIGURES; i++)
        for (int64_t j = 0; j < width; j++)
            hidden[j] += x[i] * w[i * width + j];
    for (int64_t j = 0; j < width; j++)
        hidden[j] = quick_tanh(hidden[j] * scale + bias[j]) * out[j];
    float sum = m->policy_out_bias[head];
    for (int64_t j = 0; j < width; j++)
        sum += hidden[j];
    return sum;
}

/* Decide for B rows after a layer in 1..L-1.
 *
 * hidden [B,T,H]; lengths [B], or NULL where no row is padded; before, after: memory [B,3C+3] of the layer below (not
 * read at layer 1) and of this one, each row with what it would answer [C] and its log-odds of Exit behind it, so that
 * there are 4C+4 numbers a row; order [B], or NULL where there is one row: the numbers of the rows whose odds exceed cut,
 * then of the others, each rising. Returns how many leave, or -1 without memory.
 */
int64_t rl_exit_decide(const Heads *m, int64_t layer, const float *hidden, int64_t rows, int64_t tokens,
                       const int64_t *lengths, float cut, const float *before, float *after, int64_t *order)
{
    const int64_t size = m->hidden, c = m->classes, wide = m->answer_width, head = layer - 1, kept = 4 * c + 4;
    float *work = malloc((size_t)(BLOCK * (size + wide) + 2 * BLOCK * c + m->width) * sizeof(float));
    if (work == NULL)
        return -1;
    float *state = work, *inner = state + BLOCK * size, *said = inner + BLOCK * wide;
    float *z = said + BLOCK * c, *units = z + BLOCK * c, x[FIGURES];
    int64_t leaving = 0, staying = 0;
    for (int64_t start = 0; start < rows; start += BLOCK) {
        const int64_t count = rows - start < BLOCK ? rows - start : BLOCK;
        for (int64_t r = 0; r < count; r++) {
            const int64_t row = start + r, length = lengths == NULL ? tokens : lengths[row];
            pooled(m, hidden + row * tokens * size, tokens, length, state + r * size);
        }
        product(count, size, c, state, m->exit_weight + head * size * c, m->exit_bias + head * c, z);
        if (wide) {
            product(count, size, wide, state, m->answer_in + head * size * wide, m->answer_in_bias + head * wide,
                    inner);
            for (int64_t i = 0; i < count * wide; i++) /* GELU */
                inner[i] = quick_gelu(inner[i]);
            product(count, wide, c, inner, m->answer_out + head * wide * c, m->answer_out_bias + head * c, said);
            for (int64_t i = 0; i < count * c; i++)
                z[i] = m->scale[head] * z[i] + said[i];
        }
        for (int64_t r = 0; r < count; r++) {
            const int64_t row = start + r;
            float *mine = after + row * kept;
            float odds = figures(m, layer, z + r * c, before == NULL ? NULL : before + row * kept, mine, x);
            if (m->width)
                odds = policy(m, head, x, units);
            memcpy(mine + 3 * c + 3, z + r * c, (size_t)c * sizeof(float));
            mine[kept - 1] = odds;
            if (order == NULL)
                leaving += odds > cut;
            else if (odds > cut)
                order[leaving++] = row;
            else
                order[rows - ++staying] = row;
        }
    }
    for (int64_t i = leaving, j = rows - 1; order != NULL && i < j; i++, j--) { /* those who stay were written from the end */
        const int64_t row = order[i];
        order[i] = order[j];
        order[j] = row;
    }
    free(work);
    return leaving;
}
