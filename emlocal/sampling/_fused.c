/* One row of logits through the EM step, temperature, truncation and the draw, in one call.
 *
 * What decoding does nine times in ten, without numpy's dozen sweeps: between two tokens the caches hold the
 * model's weights, so every sweep over the row, and every library call, comes cold.
 *
 * The mathematics is in _fused_row.h. It is compiled once for each width of vector registers, and the widest
 * that the processor has is taken when the module is loaded. This needs GCC or clang (the vector extensions);
 * elsewhere the module is not built, and numpy does the work.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 128      /* tokens whose weights are summed in float32; float64 across blocks */
#define MAX_HEAD 65536 /* flatter rows are numpy's */
#define CUTOFF 1e-6
#define LOWEST_TOP -15.0f
#define HIGHEST_TOP 50.0f /* squares of the tail's weights stay within float32 */
#define DOUBT 1e-5
#define TOLERANCE 9e-6
#define ROUNDING 5e-7
#define ROUNDING64 1e-14
#define HIGHEST 80.0
#define NEGLIGIBLE 1e-7
#define COLDEST 1e-9
#define HOTTEST 2.0 /* with steps taken; hotter rows are the reference's */
#define HOTTEST_ADAM 1.0
#define ADAM1 0.9
#define ADAM2 0.999
#define ADAM_EPSILON 1e-8
#define FEW 4      /* fewer than one legal token in so many are gathered */
#define BINS 12    /* of the tail, by exponent */
#define ROUNDING_BINS 5e-6 /* relative error of a bin's float32 sums, of up to 64 additions each */
#define COLDEST_EM 1e-6 /* the lowest τ of adaptive temperature */
#define ROUNDING_COOLED 5e-6 /* relative error of sums of w^β: β s is rounded before its exponential */

/* Where the bins of the tail begin, in nats below the cutoff: close where a weight is near the ε of Adam. */
static const double EDGES[BINS] = {0, 0.5, 1.1, 1.8, 2.5, 3.2, 3.9, 4.6, 5.3, 6.2, 8, 12};

/* EM steps; emlocal/sampling/sampler.py has the same numbers. */
enum { NONE, DESCENT, ADAM, COOLING, POWER };

typedef struct {
    int kind;
    double threshold;
    int steps;
    double learning_rate, kl_weight;
    double alpha; /* of COOLING: the share of the entropy that is kept; of POWER: the exponent */
    double temperature, dynatemp_range, dynatemp_exponent, top_p, min_p;
    Py_ssize_t top_k;
    double u;
} Settings;

/* The caller's memory; [0, n) of each array is in use. */
typedef struct {
    int32_t id[MAX_HEAD];    /* token ids of the head, ascending */
    int32_t order[MAX_HEAD]; /* heap of positions in the head */
    double s[MAX_HEAD];      /* exponents of the head, the largest 0 */
    double h[MAX_HEAD];      /* … after EM */
    double w[MAX_HEAD];      /* e^h */
    double g[MAX_HEAD];
    double t[MAX_HEAD]; /* weights after temperature, the largest 1 */
    double moments[5][MAX_HEAD]; /* of Adam and of its error; see Moments */
    double blocks[];    /* Σ_tail w by block; filled where a draw needs them */
} Scratch;

typedef struct {
    const float *row;
    Py_ssize_t V, n;
    Py_ssize_t vocabulary; /* V, or of which `row` has the legal tokens alone */
    const unsigned char *mask; /* the legal tokens, if the others are still to be covered; else NULL */
    float *covered;            /* memory for that, [V] */
    double top;
    double scale; /* w = scale · e^row */
    double tail_mass, tail_moment, Q0, Q1, Q2;
    double partition, entropy;
    double blocks_beta, blocks_mass; /* what Scratch.blocks holds; 0: nothing */
} Row;

/* The row after EM (or as it is): exponents of the head, what became of the tail, Σ w, H. */
typedef struct {
    const double *head;
    double tail_factor, tail_power; /* a tail token's new weight is tail_factor · w^tail_power */
    int uneven;                     /* its tokens differ by too much for that; their sum is right */
    double tail_mass, partition, entropy;
    int steps;
} Sharpened;

/* Adam's state for each token, and the error of its logit with the state that Adam's tangent has. */
typedef struct {
    double *mean, *square, *dmean, *dsquare, *off;
} Moments;

typedef struct {
    int32_t token, without; /* without: what the same u draws if the EM step is left out */
    double entropy_before, entropy_after, p_before, p_after;
    int steps;
} Drawn;

#define INLINE static inline __attribute__((always_inline))

/* The mask's bits for tokens start … start + 63, those beyond the row cleared. */
static uint64_t bits_at(const unsigned char *mask, Py_ssize_t start, Py_ssize_t V)
{
    uint64_t bits = 0;
    for (Py_ssize_t byte = 0; byte < 8 && start + 8 * byte < V; byte++)
        bits |= (uint64_t)mask[start / 8 + byte] << 8 * byte;
    return start + 64 > V ? bits & ((UINT64_C(1) << (V - start)) - 1) : bits;
}

#define WIDTH 16 /* SSE2, NEON */
#define FOR_WIDTH(name) name##_16
#include "_fused_row.h"
#undef WIDTH
#undef FOR_WIDTH

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CHOICE
#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define WIDTH 32
#define FOR_WIDTH(name) name##_32
#include "_fused_row.h"
#undef WIDTH
#undef FOR_WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512")
#define WIDTH 64
#define FOR_WIDTH(name) name##_64
#include "_fused_row.h"
#undef WIDTH
#undef FOR_WIDTH
#pragma GCC pop_options
#endif

static int (*sample)(Row *, Scratch *, const Settings *, Drawn *) = sample_16;
static int width = 16;

/* Use vectors of so many bytes, or of the most that the processor has where that is fewer. */
static void use_width(int most)
{
    width = 16;
    sample = sample_16;
#ifdef CHOICE
    if (most >= 32 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2")) {
        width = 32;
        sample = sample_32;
    }
    if (most >= 64 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        width = 64;
        sample = sample_64;
    }
#endif
}

static Py_ssize_t count_legal(const unsigned char *mask, Py_ssize_t V)
{
    Py_ssize_t n = 0;
    for (Py_ssize_t start = 0; start < V; start += 64)
        n += __builtin_popcountll(bits_at(mask, start, V));
    return n;
}

/* The legal tokens' logits and ids, in order. */
static void gather(const float *row, Py_ssize_t V, const unsigned char *mask, float *logits, int32_t *ids)
{
    Py_ssize_t n = 0;
    for (Py_ssize_t start = 0; start < V; start += 64)
        for (uint64_t bits = bits_at(mask, start, V); bits; bits &= bits - 1) {
            ids[n] = (int32_t)(start + __builtin_ctzll(bits));
            logits[n] = row[ids[n]];
            n++;
        }
}

static PyObject *drawn_from(Py_buffer *logits, Py_buffer *scratch, Py_buffer *mask, Py_buffer *legal,
                            const Settings *set)
{
    Row row = {.row = logits->buf, .V = logits->len / (Py_ssize_t)sizeof(float)};
    Drawn drawn;
    int done = 0;
    const int32_t *ids = NULL;
    size_t needed = sizeof(Scratch) + ((size_t)row.V / BLOCK + 1) * sizeof(double);
    row.vocabulary = row.V;
    if ((size_t)scratch->len < needed) {
        PyErr_Format(PyExc_ValueError, "the scratch buffer has %zd bytes; %zu are needed", scratch->len, needed);
        return NULL;
    }
    if (row.V == 0 || row.V > INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "a row needs between 1 and 2^31 - 1 tokens");
        return NULL;
    }
    if (mask && (mask->len < (row.V + 7) / 8 || legal->len < 2 * logits->len)) {
        PyErr_Format(PyExc_ValueError, "%zd tokens need a mask of %zd bytes and %zd bytes for the legal ones; there"
                     " are %zd and %zd", row.V, (row.V + 7) / 8, 2 * logits->len, mask->len, legal->len);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    if (mask) {
        Py_ssize_t n = count_legal(mask->buf, row.V);
        int32_t *own = (int32_t *)((float *)legal->buf + row.V);
        if (n == 0 || FEW * n > row.V) /* a second sweep over illegal tokens costs less than moving the others */
            row.mask = mask->buf;
        else {
            gather(row.row, row.V, mask->buf, legal->buf, own);
            row.row = legal->buf;
            row.V = n;
            ids = own;
        }
        row.covered = legal->buf;
    }
    done = sample(&row, scratch->buf, set, &drawn);
    Py_END_ALLOW_THREADS
    if (!done)
        Py_RETURN_NONE;
    if (ids) {
        drawn.token = ids[drawn.token];
        drawn.without = ids[drawn.without];
    }
    return Py_BuildValue("iddiddi", (int)drawn.token, drawn.entropy_before, drawn.entropy_after, drawn.steps,
                         drawn.p_before, drawn.p_after, (int)drawn.without);
}

#define SETTINGS                                                                                              \
    &set.kind, &set.threshold, &set.steps, &set.learning_rate, &set.kl_weight, &set.alpha, &set.temperature,  \
        &set.dynatemp_range, &set.dynatemp_exponent, &set.top_k, &set.top_p, &set.min_p, &set.u

static PyObject *draw(PyObject *module, PyObject *args)
{
    Py_buffer logits, scratch;
    Settings set;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*ididdddddnddd", &logits, &scratch, SETTINGS))
        return NULL;
    PyObject *drawn = drawn_from(&logits, &scratch, NULL, NULL, &set);
    PyBuffer_Release(&logits);
    PyBuffer_Release(&scratch);
    return drawn;
}

static PyObject *draw_legal(PyObject *module, PyObject *args)
{
    Py_buffer logits, scratch, mask, legal;
    Settings set;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*ididdddddndddy*w*", &logits, &scratch, SETTINGS, &mask, &legal))
        return NULL;
    PyObject *drawn = drawn_from(&logits, &scratch, &mask, &legal, &set);
    PyBuffer_Release(&logits);
    PyBuffer_Release(&scratch);
    PyBuffer_Release(&mask);
    PyBuffer_Release(&legal);
    return drawn;
}

static PyObject *scratch_bytes(PyObject *module, PyObject *vocabulary)
{
    Py_ssize_t V = PyLong_AsSsize_t(vocabulary);
    (void)module;
    if (V == -1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromSize_t(sizeof(Scratch) + ((size_t)V / BLOCK + 1) * sizeof(double));
}

static PyObject *limit_width(PyObject *module, PyObject *most)
{
    long asked = PyLong_AsLong(most);
    (void)module;
    if (asked == -1 && PyErr_Occurred())
        return NULL;
    use_width((int)asked);
    return PyLong_FromLong(width);
}

static PyMethodDef methods[] = {
    {"draw", draw, METH_VARARGS, "One row to one draw, or None; see _fused.pyi."},
    {"draw_legal", draw_legal, METH_VARARGS, "The same among the legal tokens; see _fused.pyi."},
    {"scratch_bytes", scratch_bytes, METH_O, "Bytes of scratch memory for a vocabulary."},
    {"limit_width", limit_width, METH_O, "Use vectors of at most so many bytes (for tests)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "emlocal.sampling._fused", "The usual row in one call.", 0, methods, NULL, NULL,
    NULL, NULL};

PyMODINIT_FUNC PyInit__fused(void)
{
    use_width(64);
    return PyModule_Create(&definition);
}
