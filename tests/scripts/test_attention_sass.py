"""What is counted of a step in a disassembled kernel."""

from scripts.attention_sass import count, step

EXPONENTIALS = "        /*0300*/    MUFU.EX2 R2, R2 ;\n" * 16
# A wait for a barrier, which jumps back too; two groups of products; and afterwards the
# slow path of the wait, from where the loop is entered again.
SASS = f"""
.L_x_1:
        /*0100*/    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R16 ;
        /*0110*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0120*/    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
        /*0130*/    WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0140*/    HGMMA.64x64x16.F32.BF16 R8, R4, gdesc[UR4].tnspB, R8 ;
        /*0150*/    WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
{EXPONENTIALS}
        /*0400*/    HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], R88, gsb0 ;
        /*0410*/    WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0420*/               @P1 BRA `(.L_x_1) ;
        /*0430*/    EXIT ;
.L_x_3:
        /*0440*/    NANOSLEEP.SYNCS 0x989680 ;
        /*0450*/    BRA `(.L_x_2) ;
"""


def test_a_step_is_counted():
    counts = count(step(SASS))
    assert counts["products"] == "2 + 1"
    assert counts["tensor"] == 64 + 32 + 32
    # In units of 128 bytes: 64 rows and 128, 64 alone, 64 and 64, of 16 columns each.
    assert counts["shared"] == 48 + 16 + 32
    # Two waits for all products, one for the first, a wait for a barrier, two jumps.
    assert (counts["exp2"], counts["other"]) == (16, 6)
